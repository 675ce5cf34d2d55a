"""One command for a machine with an NVIDIA GPU and without network: `make gpu-check`."""

"""Between the host and a GPU: every transfer costs microseconds, and reading waits for all that the GPU has to do."""

import torch


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """CPU tensors of the same dtypes, shapes and bits, in one transfer; all are on the same device."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    # A tensor must start at a multiple of its item size: the widest come first.
    order = sorted(range(len(tensors)), key=lambda index: -tensors[index].itemsize)
    packed = torch.cat([tensors[index].reshape(-1).view(torch.uint8) for index in order]).cpu()
    parts = dict(zip(order, packed.split([tensors[index].nbytes for index in order]), strict=True))
    return [parts[index].view(tensor.dtype).view(tensor.shape) for index, tensor in enumerate(tensors)]


def to_device(token_ids: list[list[int]], device: torch.device | str | None) -> torch.Tensor:
    """Token ids `[rows, tokens]` on the device, without waiting for it."""
    # The driver has copied pageable memory when it returns, so the host tensor may go.
    return torch.tensor(token_ids, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Return when the device has done all it was given: a clock read before says how long giving it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

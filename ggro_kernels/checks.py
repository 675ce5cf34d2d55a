"""Checks of arguments that several ops share: a message names the argument, what came and what is wanted."""

import torch


def check_tensor(name: str, tensor: object, shape: str, like: torch.Tensor | None = None) -> None:
    """Raise unless `tensor` is a tensor with the dimensions of `shape`, such as "[R, V]", on the device of `like`."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the other tensors, got {tensor.device}")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], other: str) -> None:
    """Raise ValueError unless `tensor` has the shape that the argument `other` asks for."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)} to go with {other}, got {list(tensor.shape)}")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError unless `tensor` is of a float dtype."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_int64(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError unless `tensor` is int64."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {tensor.dtype}")


def check_per_token(name: str, tensor: torch.Tensor, vocab: int, like: torch.Tensor) -> None:
    """Raise unless `tensor` is a tensor of shape [V], V = `vocab`, on the device of `like`."""
    check_tensor(name, tensor, "[V]", like=like)
    if tensor.shape[0] != vocab:
        raise ValueError(f"{name} must have one entry per token, V={vocab}, got shape {list(tensor.shape)}")


def check_k(k: object, vocab: int, largest: int = 256) -> None:
    """Raise unless `k` is an int in 1 .. min(largest, vocab)."""
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 1 <= k <= largest or k > vocab:
        raise ValueError(f"k must be in 1 .. min({largest}, V={vocab}), got {k}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high; NaN is refused."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low} .. {high}, got {value}")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless `temperature` is in 1e-30 .. 1e30, where fp32 can divide by it."""
    check_range("temperature", temperature, 1e-30, 1e30)


def check_softcap(softcap: float | None) -> None:
    """Raise ValueError unless `softcap` is None or in 1e-30 .. 1e30, where fp32 can divide by it."""
    if softcap is not None:
        check_range("softcap", softcap, 1e-30, 1e30)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def check_indices(name: str, indices: torch.Tensor, last: int | torch.Tensor, meaning: str) -> None:
    """Raise IndexError for a value of `indices` outside 0 .. last, which may differ from value to value.

    CPU only: elsewhere it would need a sync.
    """
    if indices.device.type != "cpu":
        return
    bad = ((indices < 0) | (indices > last)).nonzero()
    if len(bad):
        place = tuple(bad[0].tolist())
        bound = last[place].item() if isinstance(last, torch.Tensor) else last
        raise IndexError(
            f"{name}[{', '.join(map(str, place))}] must be in 0 .. {bound}, {meaning}, got {indices[place].item()}"
        )


def check_unit_interval(name: str, values: torch.Tensor) -> None:
    """Raise ValueError for a value of `values` [N] outside [0, 1); CPU only, elsewhere it would need a sync."""
    if values.device.type != "cpu":
        return
    bad = (~((values >= 0) & (values < 1))).nonzero()
    if len(bad):
        raise ValueError(f"{name}[{bad[0].item()}] must be in [0, 1), got {values[bad[0]].item():g}")

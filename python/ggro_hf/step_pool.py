"""Which cache a policy decodes on, and whether its tokens go through a captured step: decided here, for every device.

A captured step belongs to a cache, whose addresses it has. When a policy is gone, its cache and step are kept for the
model's next one that needs as much room, for as long as the model lives: capturing takes as long as many tokens.
"""

import itertools
import logging
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ggro_hf.attention import PREFIX_ATTENTION
from ggro_hf.cache import RewindableCache
from ggro_hf.decode_step import DecodeStep, forward
from ggro_hf.graphs import CAPTURES
from ggro_hf.models import device_of
from ggro_hf.reading import Reader
from ggro_hf.recording import CaptureError
from ggro_hf.transfer import wait_for
from ggro_kernels.library import automatic

# Tokens. Rooms are powers of two, beyond the largest of them its multiples.
_SMALLEST_ROOM, _LARGEST_POWER = 256, 4096
# Tokens that the idle caches of a model may have room for together, if they are several.
_MOST_IDLE = 16_384
_OF_ALL_MODULES = frozenset(vars(nn.Module()))

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Slot:
    """A cache lent to one policy, and the step captured on it, if there is one."""

    cache: RewindableCache
    # What the model looked like, None where it has no captured step.
    fingerprint: Hashable | None = None
    step: DecodeStep | None = None

    @torch.inference_mode()
    def step_for(self, model: PreTrainedModel, token_ids: list[int], reader: Reader[Any]) -> DecodeStep | None:
        """The step for the last of `token_ids`, the others being in the cache; None where there is none."""
        # Before the first pass the cache has no buffers to capture.
        if self.fingerprint is None or len(token_ids) == 1:
            return None
        # The last row is no token's, see `StaticLayer`.
        if len(token_ids) >= self.cache.rows:
            self.cache.grow()
        try:
            if self.step is None or self.step.rows != self.cache.rows:
                self.step = _capture(model, self.cache, token_ids)
            self.step.prepare(reader)
        # Whatever it is, the ordinary pass can do without.
        except Exception as error:
            self.cache.rewind(len(token_ids) - 1)
            reason = str(error) if isinstance(error, CaptureError) else f"{type(error).__name__}: {error}"
            _refusals[model] = (self.fingerprint, reason.partition("\n")[0])
            _logger.warning("%s decodes by %s", type(model).__name__, describe(model))
            self.fingerprint = self.step = None
        return self.step


_refusals: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Hashable, str]] = weakref.WeakKeyDictionary()
_idle: weakref.WeakKeyDictionary[PreTrainedModel, list[Slot]] = weakref.WeakKeyDictionary()


def lend(borrower: object, model: PreTrainedModel, capacity: int) -> Slot:
    """An empty cache with room for that many tokens, until `borrower` is gone."""
    device = device_of(model)
    if device.type not in CAPTURES:
        return Slot(RewindableCache(model.config, capacity))
    fingerprint = fingerprint_of(model)
    if fingerprint == _refusals.get(model, (None, ""))[0]:
        return Slot(RewindableCache(model.config, capacity))
    _refusals.pop(model, None)
    room = _room(capacity)
    # All at once, so that no other thread takes the same.
    idle = [slot for slot in _idle.pop(model, []) if slot.fingerprint == fingerprint]
    # Exactly that room: the rounding of sums over the cache may depend on it.
    slot = next((slot for slot in idle if slot.cache.rows == room), None)
    if slot is None:
        slot = Slot(RewindableCache(model.config, room), fingerprint)
    else:
        idle.remove(slot)
        with torch.inference_mode():
            slot.cache.clear()
    _idle[model] = idle
    weakref.finalize(borrower, _take_back, weakref.ref(model), slot, device).atexit = False
    return slot


def describe(model: PreTrainedModel) -> str:
    """How the model's tokens are decoded, for people."""
    kind = device_of(model).type
    captured = "a recording of one" if kind == "cpu" else "a CUDA graph"
    if model in _refusals:
        return f"ordinary forward passes, not as {captured}: {_refusals[model][1]}"
    return captured if kind in CAPTURES else "ordinary forward passes"


def _take_back(model_reference: weakref.ref[PreTrainedModel], slot: Slot, device: torch.device) -> None:
    model = model_reference()
    if model is None or slot.step is None or slot.step.rows != slot.cache.rows:
        return
    # The next borrower may be on another stream.
    wait_for(device)
    slot.step.stop()
    kept = [slot]
    for idle in reversed(_idle.get(model, [])):
        if sum(x.cache.rows for x in [*kept, idle]) <= _MOST_IDLE:
            kept.insert(0, idle)
    _idle[model] = kept


def _room(capacity: int) -> int:
    """Rows for that many tokens and the last, which is none's."""
    if capacity < _LARGEST_POWER:
        return max(_SMALLEST_ROOM, 1 << capacity.bit_length())
    return (capacity // _LARGEST_POWER + 1) * _LARGEST_POWER


def _capture(model: PreTrainedModel, cache: RewindableCache, token_ids: list[int]) -> DecodeStep:
    check_capturable(model)
    length = len(token_ids) - 1
    expected = forward(model, cache, token_ids[length:]).clone()
    cache.rewind(length)
    *preferred, own = _attentions(model)
    for attention in preferred:
        try:
            return DecodeStep(model, cache, attention, token_ids, expected)
        except (CaptureError, RuntimeError, TypeError, ValueError) as error:
            _logger.info("%s cannot decode with %s: %s", type(model).__name__, attention, error)
    return DecodeStep(model, cache, own, token_ids, expected)


def _attentions(model: PreTrainedModel) -> list[str]:
    """Attention implementations to try, the model's own last."""
    own: str = model.config._attn_implementation
    # `prefix_attention` reads what is there of the cache and each key once; a mask has the model's own read all of it,
    # and copy the keys for every query head. Whoever asked for "eager" wants that.
    if own == "eager" or automatic("prefix_attention", device_of(model), model.dtype) == "reference":
        return [own]
    return [own] if own == PREFIX_ATTENTION else [PREFIX_ATTENTION, own]


def check_capturable(model: PreTrainedModel) -> None:
    """Raise CaptureError where a captured pass would leave out what the model does in Python."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise CaptureError(f"its weights are on several devices ({', '.join(sorted(map(str, devices)))})")
    if model.training:
        raise CaptureError("it is in training mode; call model.eval()")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            raise CaptureError(
                f"{f'module {name!r}' if name else 'it'} has hooks, which a captured pass would not call"
            )


def fingerprint_of(model: PreTrainedModel) -> Hashable:
    """Changes with whatever a captured pass has fixed: addresses, and settings that modules look at."""
    return model.config._attn_implementation, tuple(_state(module) for module in model.modules())


def _state(module: nn.Module) -> Hashable:
    """Addresses of a module's tensors, its flags and numbers, lists and dictionaries of such (those of adapters)."""
    tensors = itertools.chain(module._parameters.values(), module._buffers.values())
    own = vars(module)
    return (
        id(module),
        id(own.get("forward")),
        len(module._forward_hooks) + len(module._forward_pre_hooks),
        module.training,
        tuple(_address(tensor) for tensor in tensors if tensor is not None),
        tuple((name, str(value)) for name, value in own.items() if name not in _OF_ALL_MODULES and _is_plain(value)),
    )


def _address(tensor: torch.Tensor) -> int:
    # Tensors that are made of others (quantised, distributed) have no address of their own.
    return tensor.data_ptr() if type(tensor) in (torch.Tensor, nn.Parameter) else id(tensor)


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return all(isinstance(item, bool | int | float | str) for item in value)
    return isinstance(value, bool | int | float | str)

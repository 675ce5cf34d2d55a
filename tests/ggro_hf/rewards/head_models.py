"""Directories of small random backbones with heads, in the file layouts and with the tensor names of real ones."""

import json

import torch
from safetensors.torch import load_file, save_file

from tests.ggro_hf.small_models import small_policy

VOCABULARY, WIDTH = 300, 32

# Checkpoints with a class of their own name code that is not there, and must not be asked for.
OWN_CLASS = {
    "architectures": ["OwnRewardModel"],
    "auto_map": {
        name: f"modeling_own.Own{name}"
        for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    },
}


def two_layers(random, module, outputs=1, inner=WIDTH):
    shapes = {
        f"{module}.0.weight": (inner, WIDTH),
        f"{module}.0.bias": (inner,),
        f"{module}.2.weight": (outputs, inner),
        f"{module}.2.bias": (outputs,),
    }
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def gated(random, objectives=5, inner=12):
    shapes = {
        "regression_layer.weight": (objectives, WIDTH),
        "reward_transform_matrix": (objectives, objectives),
        "gating.logit_scale": (1,),
    }
    for layer, (rows, columns) in enumerate([(inner, WIDTH), (inner, inner), (inner, inner), (objectives, inner)]):
        shapes |= {f"gating.layers.{layer}.weight": (rows, columns), f"gating.layers.{layer}.bias": (rows,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def checkpoint(
    directory, head_tensors, *, family="llama", shards=1, tokenizer=None, keep_lm_head=False, config=None, **policy
):
    """A causal model's directory with a head's tensors, in one file or several with an index; its backbone."""
    model = small_policy(family, seed=5, vocabulary=VOCABULARY, dtype=torch.float32, **policy)
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    if not keep_lm_head:
        tensors.pop("lm_head.weight")
    tensors |= head_tensors
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        (directory / "model.safetensors").unlink()
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % shards == shard}
            save_file(part, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    rewrite_config(directory, **(config or {}))
    return model.model


def rewrite_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hidden_states(backbone, ids):
    with torch.no_grad():
        return backbone(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]

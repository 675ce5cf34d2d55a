"""Recipes for the tests of training, as tables and as files."""

import json


def tables(sources, output, *, model="causal", arguments=None, **changes):
    """A recipe as its tables."""
    given = {
        "use_cpu": True,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "save_steps": 4,
        "eval_steps": 4,
        "disable_tqdm": True,
    }
    return {
        "output": str(output),
        "seed": 3,
        "model": {"name": str(sources / model)},
        "data": {"source": str(sources / "pairs.jsonl"), "held_out_pairs": 8},
        "weights": {"mode": "none"},
        "agreement": {"lengths": [2, 5]},
        "train": {"arguments": given | (arguments or {})},
        **changes,
    }


def write_toml(path, values):
    """A recipe file, of what these tests use of TOML."""
    lines = []

    def write(table, name):
        plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
        if name:
            lines.append(f"[{name}]")
        lines.extend(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in plain.items())
        for key, value in table.items():
            if isinstance(value, dict):
                write(value, f"{name}.{key}" if name else key)

    write(values, "")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path

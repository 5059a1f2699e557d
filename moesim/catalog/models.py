"""Models by name, from a Hugging Face ``config.json`` on disk, or from a design YAML."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from moesim.catalog.design import is_design, model_from_design
from moesim.catalog.hf import model_from_config
from moesim.describe.model import Model
from moesim.door import read_json, read_yaml
from moesim.errors import InputError, near_match

MODEL_NAMES = (
    "mixtral-8x7b",
    "mixtral-8x22b",
    "deepseek-v2",
    "deepseek-v3",
    "switch-base-128",
    "switch-c-2048",
    "qwen3-30b-a3b",
    "qwen3-235b-a22b",
    "gpt-oss-120b",
    "olmoe-1b-7b",
    "kimi-k2",
    "moonlight-16b-a3b",
    "grok-1",
    "llama-3-8b",
    "llama-3-70b",
    "hypothetical-1t-a50b",
)
_PRESETS = Path(__file__).parent / "models"


def load_model(name_or_path: str | Path) -> Model:
    """A model of the catalog by name, or one described by a file.

    name_or_path: one of MODEL_NAMES, the path of a Hugging Face config.json (or the folder that holds it), or the path
    of a design YAML. Raises InputError for an unknown name (with the nearest one) or a bad file, NotModelledError for
    layers that moesim does not model.

    >>> len(load_model("mixtral-8x7b").layers)
    32
    """
    text = str(name_or_path)
    if text in MODEL_NAMES:
        return _preset(text)
    path = Path(text)
    looks_like_path = "/" in text or path.suffix in (".json", ".yaml", ".yml") or path.exists()
    if not looks_like_path:
        hint = near_match(text, MODEL_NAMES)
        raise InputError("model", "name", "is neither a known model nor a file", text, hint)
    return _from_file(path / "config.json" if path.is_dir() else path)


@cache
def _preset(name: str) -> Model:
    """A preset of the catalog; models are immutable, so one copy serves all."""
    if name.startswith("hypothetical"):
        return model_from_design(read_yaml(_PRESETS / f"{name}.yaml"), owner=f"model {name}")
    return model_from_config(read_json(_PRESETS / f"{name}.json"), name=name, owner=f"model {name}")


def _from_file(path: Path) -> Model:
    owner = str(path)
    is_yaml = path.suffix in (".yaml", ".yml")
    raw = read_yaml(path) if is_yaml else read_json(path, keep_non_finite_as_text=True)
    if is_design(raw):
        return model_from_design(raw, owner=owner)
    name = path.resolve().parent.name if path.stem == "config" else path.stem
    return model_from_config(raw, name=name, owner=owner)

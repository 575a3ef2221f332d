"""Settings that transformers loads but refuses to write, put right before the first step: a trained model is saved.

``pad_token_id: -1`` (the first LLaMA checkpoints), a temperature without sampling, ``output_attentions`` and the like
load with a warning at most and stop ``save_pretrained``, days later. What a setting means is kept where it can be;
what is changed is said.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

_MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_SHOWN = 60  # characters of a value


def mend_settings(model: Any) -> list[str]:
    """Give what ``save_pretrained`` of ``model`` would refuse a value that it writes, in place.

    Returns:
        A sentence for each change.
    """
    parts = {id(part): part for part in (model.config, model.config.get_text_config())}.values()
    changes = [change for part in parts for change in _mend_config(part)]
    changes += _mend_quantization(model)
    if any("pad_token_id" in change for change in changes):
        # -1 counts from the end: torch would never train the last token's embedding
        model.get_input_embeddings().padding_idx = None
    if getattr(model, "generation_config", None) is not None:
        changes += _mend_marks(model.generation_config, _GENERATION) + _mend_generation(model.generation_config)
    return list(dict.fromkeys(changes))


def _mend_config(config: Any) -> list[str]:
    changes = _mend_marks(config, _CONFIG)
    if getattr(config, "output_attentions", False):
        config.output_attentions = False
        changes.append(f"{_CONFIG}: output_attentions is turned off")
    try:
        config.to_json_string()
    except (TypeError, ValueError):
        changes += _drop_objects(config)
    return changes


def _drop_objects(config: Any) -> list[str]:
    """Leave out what cannot be written as JSON, by transformers' own conversions."""
    changes = []
    for name, value in config.to_dict().items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            delattr(config, name)
            changes.append(f"{_CONFIG}: {name} is left out, a {type(value).__name__} is not JSON")
    return changes


def _mend_quantization(model: Any) -> list[str]:
    """Weights that were read as they are need no note of how others were packed."""
    config = model.config
    if getattr(config, "quantization_config", None) is None or getattr(model, "hf_quantizer", None) is not None:
        return []
    del config.quantization_config
    return [f"{_CONFIG}: quantization_config is left out, the weights are plain"]


def _mend_marks(settings: Any, file: str) -> list[str]:
    """Negative ids of BOS, EOS and padding mean that there is none."""
    changes = []
    for name in _MARKS:
        value = getattr(settings, name, None)
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(one, int) and one < 0 for one in ids):
            kept = [one for one in ids if not isinstance(one, int) or one >= 0]
            setattr(settings, name, kept if isinstance(value, list) and kept else None)
            changes.append(f"{file}: {name} {value} is written as {getattr(settings, name) or 'none'}")
    return changes


def _mend_generation(generation: Any) -> list[str]:
    """Of settings that contradict each other, those are left out that say least.

    Many models name a temperature and do not say that they sample; they mean to. Those that say they do not, do not.
    """
    changes, dropped = [], _refused(generation)
    if dropped and generation.do_sample is None and generation.temperature != 0:
        sampling = deepcopy(generation)
        sampling.do_sample = True
        if len(_refused(sampling)) < len(dropped):
            generation.do_sample, dropped = True, _refused(sampling)
            changes.append(f"{_GENERATION}: do_sample is written as true, as its temperature or the like ask for")
    usual = vars(type(generation)())
    for name in dropped:
        value = str(getattr(generation, name))[:_SHOWN]
        changes.append(f"{_GENERATION}: {name} {value} is left out, transformers refuses it")
        _reset(generation, name, usual)
    return changes


def _refused(generation: Any) -> list[str]:
    """Settings without which all the others can be written: those that fit are put together, one by one."""
    if _is_written(generation):
        return []
    kept = type(generation)()
    usual = dict(vars(kept))
    waiting = {name: value for name, value in vars(generation).items() if value != usual.get(name)}
    while fitting := [name for name, value in waiting.items() if _takes(kept, name, value, usual)]:
        for name in fitting:
            del waiting[name]
    return sorted(waiting)


def _takes(kept: Any, name: str, value: Any, usual: Mapping[str, Any]) -> bool:
    setattr(kept, name, value)
    if _is_written(kept):
        return True
    _reset(kept, name, usual)
    return False


def _reset(settings: Any, name: str, usual: Mapping[str, Any]) -> None:
    if name in usual:
        setattr(settings, name, usual[name])
    else:
        delattr(settings, name)


def _is_written(generation: Any) -> bool:
    try:
        generation.validate(strict=True)
        generation.to_json_string()
    except (ValueError, TypeError):
        return False
    return True

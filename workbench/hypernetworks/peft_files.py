"""Generated low-rank weights in PEFT's file format: what a condition gives is then an ordinary LoRA adapter.

PEFT's product is lora_B lora_A scaled by alpha / r; here alpha = r, down = lora_A^T and up = lora_B^T.

Source: Hu et al. (2021), LoRA, arXiv 2106.09685; the format of huggingface/peft, LoraConfig.
"""

import json
import re
from pathlib import Path

from safetensors.torch import save

from workbench.errors import DataError
from workbench.files import write_atomic
from workbench.hypernetworks.spec import GeneratedWeights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_peft(weights: GeneratedWeights, folder: Path, condition: int = 0, base_model: str = "") -> Path:
    """Write one condition's generated factors as a LoRA adapter that PEFT loads.

    Args:
        weights: of a spec made with a rank; every slot a pair of factors.
        folder: of the adapter; made if it is not there.
        condition: which of the U conditions.
        base_model: name or path of the model that the adapter is for, as PEFT notes it; may be empty.

    Returns:
        The folder.

    Raises:
        DataError: a slot without factors, which a LoRA adapter cannot hold, or no such condition.
    """
    whole = [slot.name for slot in weights.spec.slots if slot.mode != "lowrank"]
    if whole:
        raise DataError(
            f"a LoRA adapter holds factors only, {', '.join(whole)} were generated whole; make the spec with "
            'include="*.weight" and a rank'
        )
    if not 0 <= condition < len(weights):
        raise DataError(f"condition {condition} of {len(weights)}; give 0 to {len(weights) - 1}")
    tensors = {}
    for slot in weights.spec.slots:
        for part, name in (("down", "lora_A"), ("up", "lora_B")):
            factor = weights.tensors[f"{slot.name}.{part}"][condition].detach().cpu()
            tensors[f"base_model.model.{slot.name}.{name}.weight"] = factor.T.contiguous()
    # PEFT takes a list of names as endings ("0" is "1.0" too), a string as a pattern of the whole name; a
    # rank's name is a pattern of an ending, so it has to say where the name starts.
    names = sorted(slot.name for slot in weights.spec.slots)
    ranks = {f"^{re.escape(slot.name)}": slot.rank for slot in weights.spec.slots}
    largest = max(ranks.values())
    about = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_model or None,
        "r": largest, "lora_alpha": largest, "rank_pattern": ranks, "alpha_pattern": ranks,
        "target_modules": "|".join(map(re.escape, names)), "bias": "none", "lora_dropout": 0.0,
        "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS, save(tensors))
    write_atomic(folder / CONFIG, json.dumps(about, indent=1))
    return folder

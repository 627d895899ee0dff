"""What can be known before a training is checked before it: settings, memory, disk, folders, launchers.

`cfg` is a whole config of train_gpt.py. What artifacts were made with is not asked of them: they load.
Packed programs leave this out.
"""

from common import UserError
from formats.recipe import config_value


def new_run_rules(cfg) -> list[tuple]:
    """Return rows (field, whether the rule holds, what must hold) of what no new run may be told to do.

    With scale_floor the steps of weights below 1 are 1 / largest code: at 4 bits most of them become 0.
    """
    quant = cfg.quant
    allocates = quant.method == "gptq" and quant.target_bytes > 0  # from 2 bits on
    least = min(quant.matrix_bits, quant.embed_bits, quant.mlp_bits or 8, 2 if allocates else 8)
    floor_fits = not quant.scale_floor or quant.method == "water_fill" or least == 8
    return [
        (
            "quant.scale_floor",
            floor_fits,
            f"destroys weights of {least} bits: set quant.scale_floor=0, or 8 bits throughout",
        )
    ]


def check_new_run(cfg) -> None:
    """Raise naming field, value and constraint where a new run should not be told so."""
    for name, holds, constraint in new_run_rules(cfg):
        if not holds:
            raise UserError(f"{name}={config_value(cfg, name)} {constraint}.")

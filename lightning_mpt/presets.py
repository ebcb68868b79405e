"""How much of the model's state to keep, as choices: arguments of MasterWeightPrecision that belong together.

    MasterWeightPrecision("bf16-true", **PRESETS["compact"])

| preset | bytes per parameter | what it costs |
| --- | --- | --- |
| `exact` | 14 | nothing: the masters and moments of FP32 training, bit for bit |
| `compact` | 7.1 | masters of 24 bits, moments of 8: noise that is right on average |
| `minimal` | 5.1 | the same, and no gradient is ever kept: see `gradient_release` for what that rules out |
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"master_weights": "split", "optimizer_state": "float32"},
    "compact": {"master_weights": "split8", "optimizer_state": "8bit"},
    "minimal": {"master_weights": "split8", "optimizer_state": "8bit", "gradient_release": True},
}

"""What the plugin refuses, or warns of, by name: arguments, modules and optimizers that it cannot train."""

import copy
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from training import Classifier, adamw, classification, fit, mlp, trainer

from lightning_mpt import MasterWeightPrecision


def test_lbfgs_is_refused_and_the_module_left_as_it_was() -> None:
    module = Classifier(mlp(), lambda module: torch.optim.LBFGS(module.parameters()))
    start = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"LBFGS evaluates the loss many times.*use another optimizer"):
        fit(module, classification(1), MasterWeightPrecision("16-true"))
    torch.testing.assert_close(module.state_dict(), start, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda net: net.double(), TypeError, "0.weight is torch.float64.*64-true"),
        (lambda net: net[0].weight.data.view(-1)[3].fill_(float("nan")), ValueError, "0.weight holds inf or NaN"),
        (lambda net: net[2].bias.data.view(-1)[3].fill_(float("inf")), ValueError, "2.bias holds inf or NaN"),
        (lambda net: net[4].bias.data.view(-1)[3].fill_(-7e4), ValueError, "4.bias holds.*7?0000.*use 'bf16-true'"),
        (lambda net: net.append(nn.Embedding(3, 3, sparse=True)), ValueError, "5 has sparse=True"),
    ],
    ids=["float64", "nan", "inf", "range", "sparse"],
)
def test_a_module_that_cannot_be_trained_is_refused_and_left_as_it_was(break_it: Any, error: Any, message: str) -> None:
    module = Classifier(mlp())
    break_it(module.net)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        fit(module, classification(1), MasterWeightPrecision("16-true"))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_a_half_module_warns_and_starts_from_its_values() -> None:
    module = Classifier(mlp().bfloat16(), adamw(0.0, weight_decay=0.0))
    start = [parameter.detach().float() for parameter in module.parameters()]
    with pytest.warns(UserWarning, match=r"6 parameters \(net.0.weight first\) were half precision already"):
        fit(module, classification(1), MasterWeightPrecision("16-true"))
    torch.testing.assert_close([p.detach() for p in module.parameters()], start, rtol=0, atol=0)


def test_one_plugin_in_two_trainers_at_once_is_refused() -> None:
    plugin = MasterWeightPrecision("bf16-true")

    class Nested(Classifier):
        def on_train_start(self) -> None:
            fit(Classifier(mlp()), classification(1), plugin)

    with pytest.raises(RuntimeError, match=r"in use by another Trainer.*give every Trainer its own"):
        fit(Nested(mlp()), classification(1), plugin)


def test_precision_beside_the_plugin_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Received both `precision=16-mixed` and `plugins="):
        trainer(MasterWeightPrecision("16-true"), precision="16-mixed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "16-mixed"}, r"precision='16-mixed' is not one of '16-true', 'bf16-true'"),
        ({"precision": 16}, r"precision=16 is not one of"),
        ({"loss_scale": 0}, r"loss_scale=0 is not a loss scale: use 'auto'"),
        ({"loss_scale": -2.0}, r"loss_scale=-2.0 is not"),
        ({"loss_scale": float("nan")}, r"loss_scale=nan is not"),
        ({"loss_scale": "big"}, r"loss_scale='big' is not"),
        ({"loss_scale": True}, r"loss_scale=True is not"),
        ({"master_weights": "fp32"}, r"master_weights='fp32' is not a way.*'float32', 'split'"),
        ({"optimizer_state": "4bit"}, r"optimizer_state='4bit' is not a way.*'float32'"),
        ({"loss_scale": 1e40}, r"loss_scale=1e\+40 is not a loss scale.*that float32 holds"),
        ({"loss_scale": 1e-50}, r"loss_scale=1e-50 is not"),
        ({"fp32_modules": ["LayerNorm"]}, r"fp32_modules=\['LayerNorm'\] must be module types"),
        ({"autocast": "no"}, r"autocast='no' must be True or False"),
        ({"gradient_release": "no"}, r"gradient_release='no' must be True or False"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_fail_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MasterWeightPrecision(**arguments)


def test_in_fabric_the_trainers_plugin_names_fabrics() -> None:
    with pytest.raises(TypeError, match=r"is for the Trainer.*use FabricMasterWeightPrecision\('16-true'\)"):
        Fabric(accelerator="cpu", plugins=[MasterWeightPrecision("16-true")]).setup(nn.Linear(2, 2))


def test_beyond_bfloat16_there_is_no_half_type_to_go_to() -> None:
    module = Classifier(mlp())
    module.net[0].weight.data[0, 0] = 3.4e38
    with pytest.raises(ValueError, match=r"0.weight holds.*3.4e\+38.*of torch.bfloat16: rescale the weight"):
        fit(module, classification(1), MasterWeightPrecision("bf16-true"))


class Continued(Classifier):
    """Begins with moments of FP32 training."""

    def __init__(self, where: str) -> None:
        super().__init__(mlp(), adamw(1e-3))
        self._where = where
        module = Classifier(mlp(), adamw(1e-3))
        self.saved = fit(module, classification(3)).optimizers[0].state_dict()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self._where == "configure_optimizers":
            optimizer.load_state_dict(self.saved)
        return optimizer

    def on_train_start(self) -> None:
        if self._where == "on_train_start":
            self.optimizers().load_state_dict(self.saved)


@pytest.mark.parametrize("optimizer_state", ["float32", "8bit"])
def test_moments_that_torch_made_half_are_refused_and_what_the_message_says_works(optimizer_state: str) -> None:
    plugin = MasterWeightPrecision("16-true", optimizer_state=optimizer_state)
    with pytest.raises(ValueError, match=r"AdamW comes with moments in torch.float16.*in on_train_start, by"):
        fit(Continued("configure_optimizers"), classification(1), plugin)
    ours, fp32 = Continued("on_train_start"), Continued("on_train_start")
    fit(ours, classification(3), MasterWeightPrecision("16-true", optimizer_state=optimizer_state))
    fit(fp32, classification(3))
    torch.testing.assert_close(ours.losses, fp32.losses, rtol=5e-3, atol=0)


def test_a_run_that_only_skips_warns_and_then_stops_with_the_names() -> None:
    class Broken(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * float("nan")  # type: ignore[operator]

    plugin = MasterWeightPrecision("bf16-true")
    with (
        pytest.warns(UserWarning, match=r"25 steps in a row were skipped.*net.0.weight"),
        pytest.raises(RuntimeError, match=r"100 steps in a row were skipped.*Not finite now: net.0.weight, net.0.bias"),
    ):
        fit(Broken(mlp()), classification(120), plugin)
    assert plugin.skipped_steps == 100

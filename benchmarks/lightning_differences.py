"""Lightning's tests that pass under `bf16-true` and not under the plugin, by design: which, and why."""

ADDED = "The plugin adds two metrics, two callbacks and an entry in checkpoints; the test counts all there are."
"""Found by a run in which it adds nothing, and not listed."""

REASONS: dict[str, tuple[str, ...]] = {
    "LBFGS is refused: it evaluates the loss many times within a step, which loss scaling cannot follow.": (
        "core/test_lightning_optimizer.py::test_lightning_optimizer_automatic_optimization_lbfgs_zero_grad",
        "trainer/optimization/test_backward_calls.py::test_backward_count_with_closure",
    ),
    "Forward and backward run before the optimizer's step, not within it: whether it is to be skipped shows in the "
    "gradients.": (
        "loops/optimization/test_closure.py::test_optimizer_step_no_closure_raises",
        "trainer/test_trainer.py::test_train_loop_system",
    ),
    "AdamW and Adam take the plugin's step, not torch's, which the test has replaced by a mock.": (
        "core/test_lightning_optimizer.py::test_lightning_optimizer_manual_optimization_and_accumulated_gradients",
        "trainer/optimization/test_manual_optimization.py::test_step_with_optimizer_closure_with_different_frequencies",
    ),
    "An optimizer that the plugin serves has a class in front of its own: isinstance holds, `type(...) is` does not.": (
        "callbacks/test_lr_monitor.py::test_multiple_optimizers_basefinetuning",
    ),
}
"""Why -> the tests, below tests_pytorch; without a parameter, all of a test's."""


def reason(test: str) -> str | None:
    """Why a test is not to pass, in words; None where it is."""
    name = test.removeprefix("tests_pytorch/")
    for why, tests in REASONS.items():
        if name in tests or name.partition("[")[0] in tests:
            return why
    return None

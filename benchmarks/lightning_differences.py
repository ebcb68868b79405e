"""Lightning's tests that pass under `bf16-true` and not under the plugin, by design: which, and why."""

REASONS: dict[str, tuple[str, ...]] = {}
"""Why -> the tests, below tests_pytorch; without a parameter, all of a test's."""


def reason(test: str) -> str | None:
    """Why a test is not to pass, in words; None where it is."""
    name = test.removeprefix("tests_pytorch/")
    for why, tests in REASONS.items():
        if name in tests or name.partition("[")[0] in tests:
            return why
    return None

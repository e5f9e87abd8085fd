"""Values of command lines that several commands of eval share."""

import pytest

from eval.arguments import check_output
from orthrus_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/place.png", "its directory does not exist"),
        ("", "is a directory"),
        ("figure.nope", "expected a name that ends in .*png"),
        ("figure", "expected a name that ends in .*png"),
    ],
)
def test_output_that_cannot_be_written_is_refused_by_flag(tmp_path, name, message) -> None:
    with pytest.raises(UserError, match=rf"^--plot .*{message}"):
        check_output("--plot", str(tmp_path / name), picture=True)


def test_output_that_can_be_written_is_accepted(tmp_path) -> None:
    check_output("--json", None)
    check_output("--json", str(tmp_path / "figures"))
    check_output("--plot", str(tmp_path / "figures.svg"), picture=True)

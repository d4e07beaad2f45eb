"""The verbs that serve, up to where they load a model and what they call it."""

from pathlib import Path

import pytest

from openbagel import cli
from openbagel.serve.limits import ServerLimits
from openbagel.verbs.serving import Serve, serviced
from openbagel.weights import save_checkpoint
from tests import tiny


@pytest.mark.parametrize("options", [["serve", "--port"], ["ui", "--server-port"]])
@pytest.mark.parametrize("port", ["99999", "-1"])
def test_what_is_no_port_is_told_before_a_model_is_loaded(
    options: list[str], port: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Serve, "load", lambda _: pytest.fail("the port was to be judged first"))
    assert cli.main([*options, port, "--model", "nowhere"]) == 2
    errors = capsys.readouterr().err
    assert f"port {port}" in errors and errors.count("\n") == 1


def test_a_model_is_called_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(tmp_path / "mine", tiny.checkpoint())
    (tmp_path / "latest").symlink_to(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    for model, name in ((".", "mine"), ("../mine/", "mine"), ("../latest", "latest")):
        service = serviced(Serve(model=model), ServerLimits(), 0)
        service.worker.close()
        assert service.name == name

"""What several files of this folder start from."""

import pytest


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files and runners of a comparison that takes no time."""
    from fakes.comparison import prepare

    return prepare(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def short_run(train_once):
    """The folder of a run of fedsir on digits, of one round."""
    _, folder = train_once(
        "fit", "--config", "fedsir/smoke.yaml", "--trainer.max_epochs=1", "--run.dir=run"
    )
    return folder / "run"

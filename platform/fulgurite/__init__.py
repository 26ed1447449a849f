"""fulgurite: research papers as plug-ins of one PyTorch Lightning trainer.

From Python, :func:`load` makes what a configuration describes:

    from fulgurite import load

    digits = load("fedsir/digits", data={"noise.rate": 0.9})
    trainer = digits.make_trainer(max_epochs=5)
    trainer.fit(digits.model, digits.data)
    trainer.test(digits.model, digits.data)

and :func:`predict` predicts files of yours with what a run has trained:

    fulgurite.predict("runs/fedsir/digits/20260101-120000", "images")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fulgurite.loading import LoadedConfig, load
    from fulgurite.predicting import predict

__all__ = ["LoadedConfig", "__version__", "load", "predict"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import Lightning when it is needed: ``fulgurite --help`` does without."""
    if name in ("LoadedConfig", "load"):
        from fulgurite import loading

        return getattr(loading, name)
    if name == "predict":
        from fulgurite.predicting import predict

        return predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

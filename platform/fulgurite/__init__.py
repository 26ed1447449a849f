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

from lazy_loader import attach_stub

__version__ = "0.1.0"

# on first use: `fulgurite --help` needs no Lightning
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
__all__ += ["__version__"]

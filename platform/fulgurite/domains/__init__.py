"""What models and datamodules of one system share: schemas, constants and protocols.

A module here has the name of its system. Only the models, the datamodules and the callbacks of that
system import it, and :mod:`fulgurite.testing`.
"""

"""Configurations described for editors: a JSON schema of runs.

``fulgurite schema`` writes it; editors with a YAML language server then complete options, show
what they are for and underline what no class has::

    # yaml-language-server: $schema=fulgurite.schema.json
    model:
      class_path: fulgurite.models.fedsir.FederatedClassifier

Whether options are there is the parser's affair: files may complete each other. What a schema
cannot say (limits between two options, files that exist) remains to ``fulgurite``.
"""

from fulgurite.schema.configurations import describe_run

__all__ = ["describe_run"]

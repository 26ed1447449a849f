"""Language models of numbers: the module, its losses and its optimizer."""

"""Ice layers as data: provenance and units, fields of a stack and their files, flights, spans."""

"""Imported relatively by the module, as packages do."""

GREETING = "from the package"

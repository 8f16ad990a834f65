"""Search for the settings of a training run: ``fastlora search``. Needs the extra ``search``."""

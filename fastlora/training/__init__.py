"""The training command: configuration, data, models and the loop, on transformers, PEFT and bitsandbytes.

Nothing is imported here, so that a part (the configuration, the errors) can be used without the packages of the others.
"""

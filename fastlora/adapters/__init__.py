"""The methods around LoRA, one file each, on the one operator ``x W^T + scale * (x A^T) B^T``.

    variant.py       adapters that are LoRA with other factors; how a layer is told to be one
    lora_fa.py       LoRA-FA: A frozen, no input kept for the backward pass
    lora_plus.py     LoRA+: B learns faster than A
    vera.py          VeRA: shared frozen factors, learned vectors between them
    delta.py         Delta-LoRA: the base moves with the adapter
    dora.py          DoRA: rows of a learned length
    starts.py        PiSSA, OLoRA and LoftQ: where A and B start
    dylora.py        DyLoRA: one adapter that works at every rank
    adalora.py       AdaLoRA: ranks distributed by importance
    rank.py          ranks that change, and one that follows the validation loss
    quantized.py     A and B in 8 or 4 bits
    chunked.py       a module a chunk of tokens at a time
    bottleneck.py    Houlsby adapters
    layerwise.py     some layers trained in full
    switch.py        from one task's adapter to another's

Everything here takes `FastLoRALinear` layers and PEFT's LoRA layers, converted or not; PEFT itself is needed only for
PEFT's layers.
"""

"""Models that cannot be patched, and why."""

from vidattn.pipelines.family import Family

FAMILY = (
    Family(
        models=("AnyFlowFARTransformer3DModel",),
        refuse="it makes a video chunk by chunk with caches, which vidattn.stream does",
    ),
    Family(
        models=("SanaWMLTX2RefinerTransformer3DModel", "WanAnimate2Transformer3DModel"),
        refuse="its attention reads a cache of earlier keys through a block mask of its own",
    ),
    Family(
        models=(
            "I2VGenXLUNet",
            "LatteTransformer3DModel",
            "MotionAdapter",
            "TransformerTemporalModel",
            "UNet3DConditionModel",
            "UNetMotionModel",
            "UNetSpatioTemporalConditionModel",
        ),
        refuse="it attends within each frame and across time at each place separately, never over "
        "a (t, h, w) grid",
    ),
    Family(
        models=(
            "SanaTransformer2DModel",
            "SanaVideoTransformer3DModel",
            "SanaWMTransformer3DModel",
        ),
        refuse="its self-attention is linear and never forms pairs of tokens, so that leaving "
        "pairs out saves nothing",
    ),
    Family(
        models=("Kandinsky6SRTransformer3DModel",),
        refuse="it was trained with a sparse pattern of its own (NABLA), which it hands to "
        "FlexAttention as a block mask",
    ),
    Family(
        models=("BriaFibo2Transformer2DModel", "NucleusMoEImageTransformer2DModel"),
        refuse="its text stands before the picture or behind it as the prompts of a batch differ, "
        "or behind it without queries",
    ),
    Family(
        models=(
            "DreamLiteTransformer2DModel",
            "DreamLiteUNetModel",
            "Kandinsky3UNet",
            "StableCascadeUNet",
            "Transformer2DModel",
            "UNet2DModel",
        ),
        refuse="it is a UNet in which attention over the picture takes little of the time, or a "
        "part of one",
    ),
    Family(
        models=("PriorTransformer", "UVit2DModel"),
        refuse="it makes embeddings or entries of a codebook, not latents on a (t, h, w) grid",
    ),
    Family(
        models=(
            "AceStepTransformer1DModel",
            "LongCatAudioDiTTransformer",
            "MiniMaxMusic3RVQDepthDecoder",
            "MiniMaxMusic3Transformer1DModel",
            "RFD4ProteinaTransformer",
            "StableAudio3DiTModel",
            "StableAudioDiTModel",
            "T5FilmDecoder",
            "UNet1DModel",
        ),
        refuse="it makes sound or proteins, which are no (t, h, w) grid",
    ),
)

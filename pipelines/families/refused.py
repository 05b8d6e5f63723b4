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
        models=("SanaVideoTransformer3DModel", "SanaWMTransformer3DModel"),
        refuse="its self-attention is linear and never forms pairs of tokens, so that leaving "
        "pairs out saves nothing",
    ),
    Family(
        models=("Kandinsky6SRTransformer3DModel",),
        refuse="it was trained with a sparse pattern of its own (NABLA), which it hands to "
        "FlexAttention as a block mask",
    ),
    # those with 2D in their names are refused by it
    Family(
        models=(
            "DreamLiteUNetModel",
            "JoyImageEditPlusTransformer3DModel",
            "JoyImageEditTransformer3DModel",
            "Kandinsky3UNet",
            "PriorTransformer",
            "StableCascadeUNet",
        ),
        refuse="it makes pictures, and only the attention of video models is made sparse",
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

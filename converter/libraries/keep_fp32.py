"""Which tensors a model's own library keeps in float32 when it loads the model in a smaller dtype.

Stored in the smaller dtype they would be widened on load, and what the cast took off would be gone. So they stay
float32 in the file: loading it gives the same tensors as loading the source in that dtype. A table has a row for each
rule and the classes that it holds for; a class that is in none keeps nothing. How an entry is matched, and for which
dtypes it holds, is for its library to say (``Library.keeps_fp32``).
"""

from __future__ import annotations

# Each row: entries, classes. For transformers: entries for float16, entries for float16 and bfloat16, classes.
# Written by scripts/make_keep_fp32.py.
MADE_FROM = {"diffusers": "0.42.1", "transformers": "5.24.0"}
DIFFUSERS: tuple[tuple[str, str], ...] = (
    (
        "time_embedder scale_shift_table norm1 norm2 norm3",
        "AnyFlowFARTransformer3DModel AnyFlowTransformer3DModel ChronoEditTransformer3DModel",
    ),
    ("encoder quant_conv norm1 norm2 norm_out scale1 scale2", "AutoencoderKLMiniMaxH3"),
    ("encoder decoder pre_block dec_in_proj mean_proj logs_proj", "AutoencoderKLMiniMaxH3Audio"),
    ("time_embedder", "Cosmos3OmniTransformer"),
    ("learnable_pos_embed", "CosmosControlNetModel CosmosTransformer3DModel"),
    ("norm_q norm_k", "Flux3Transformer2DModel"),
    ("time_embedder scale_shift_table norm1 norm2 norm3 history_key_scale", "HeliosTransformer3DModel"),
    ("time_embedder norm1 norm2 norm_out", "JoyImageEditPlusTransformer3DModel JoyImageEditTransformer3DModel"),
    ("time_embeddings modulation visual_modulation text_modulation", "Kandinsky5Transformer3DModel"),
    ("time_embeddings pooled_bias modulation", "Kandinsky6SRTransformer3DModel"),
    ("time_embeddings modulation", "Kandinsky6Transformer3DModel"),
    ("norm norm1 norm2 norm_q norm_k", "Krea2Transformer2DModel"),
    ("proj_in audio_proj_in time_embedder proj_out audio_proj_out rope", "MiniMaxH3Transformer3DModel"),
    ("latent_decoder_mean_n_log_scale norm", "RFD4ProteinaAutoencoder"),
    ("cond_factory norm ln_out", "RFD4ProteinaTransformer"),
    (
        "rope time_embedder scale_shift_table norm1 norm2 norm3",
        "SkyReelsV2Transformer3DModel WanTransformer3DModel WanVACETransformer3DModel",
    ),
    ("time_embedding time_projection scale_shift_table norm1 norm2 norm3 modulation", "WanAnimate2Transformer3DModel"),
    ("time_embedder scale_shift_table norm1 norm2 norm3 motion_synthesis_weight rope", "WanAnimateTransformer3DModel"),
)

TRANSFORMERS: tuple[tuple[str, str, str], ...] = (
    (
        "",
        "e_score_correction_bias gate.weight",
        "AXK1ForCausalLM AXK1ForSequenceClassification AXK1ForTokenClassification AXK1Model DeepseekV3ForCausalLM "
        "DeepseekV3ForSequenceClassification DeepseekV3ForTokenClassification DeepseekV3Model Dots1ForCausalLM "
        "Dots1Model Dots3NoteForCausalLM Dots3NoteForConditionalGeneration Dots3NoteModel Dots3NoteTextModel "
        "Dots3NoteVisionModel ExaoneMoeForCausalLM ExaoneMoeModel Glm4MoeForCausalLM Glm4MoeLiteForCausalLM "
        "Glm4MoeLiteModel Glm4MoeModel Glm4vMoeForConditionalGeneration Glm4vMoeModel Glm4vMoeTextModel "
        "Glm4vMoeVisionModel HYV3ForCausalLM HYV3Model NemotronHForCausalLM NemotronHModel SolarOpenForCausalLM "
        "SolarOpenModel",
    ),
    (
        "indexer.weights_proj",
        "e_score_correction_bias gate.weight",
        "AXK2ForCausalLM AXK2ForSequenceClassification AXK2ForTokenClassification AXK2Model DeepseekV32ForCausalLM "
        "DeepseekV32Model GlmMoeDsaForCausalLM GlmMoeDsaModel",
    ),
    (
        "input_layernorm post_attention_layernorm pre_mlp_layernorm post_mlp_layernorm q_norm k_norm norm",
        "expert_bias",
        "AfmoeForCausalLM AfmoeModel",
    ),
    ("", "vision_tokenizer audio_tokenizer", "Apertus1p5ForConditionalGeneration Apertus1p5Model"),
    ("", "e_score_correction_bias gate.weight conv1d dt_bias A_log", "BailingHybridForCausalLM BailingHybridModel"),
    (
        "",
        "e_score_correction_bias mlp.gate.weight",
        "BeamForCausalLM BeamForTokenClassification BeamModel MiMoV2FlashForCausalLM MiMoV2FlashModel",
    ),
    (
        "query_tokens qformer",
        "",
        "Blip2ForConditionalGeneration Blip2ForImageTextRetrieval Blip2Model Blip2TextModelWithProjection "
        "Blip2VisionModelWithProjection",
    ),
    (
        "",
        "gate.weight",
        "DeepseekOcr2TextModel DeepseekV2ForCausalLM DeepseekV2ForSequenceClassification DeepseekV2Model "
        "UnlimitedOcrTextModel",
    ),
    (
        "self_attn.compressor.kv_proj self_attn.compressor.gate_proj self_attn.compressor.indexer.kv_proj "
        "self_attn.compressor.indexer.gate_proj self_attn.compressor.indexer.scorer.weights_proj",
        "attn_hc ffn_hc hc_head sinks position_bias e_score_correction_bias q_a_norm kv_norm input_layernorm "
        "post_attention_layernorm norm",
        "DeepseekV4ForCausalLM DeepseekV4Model",
    ),
    (
        "",
        "gate.weight e_score_correction_bias",
        "Ernie4_5_MoeForCausalLM Ernie4_5_MoeModel Ernie4_5_VLMoeForConditionalGeneration Ernie4_5_VLMoeModel "
        "Ernie4_5_VLMoeTextModel Ernie4_5_VLMoeVisionTransformerPretrainedModel "
        "Ernie4_5_VL_MoeForConditionalGeneration Ernie4_5_VL_MoeModel Ernie4_5_VL_MoeTextModel "
        "Ernie4_5_VL_MoeVisionTransformerPretrainedModel",
    ),
    ("", "fourier norm.weight norm.bias norm_mix norm_start norm_single boundaries distogram_head", "EsmFold2Model"),
    ("", "gate.weight sinks", "FlintForCausalLM FlintModel"),
    (
        "",
        "e_score_correction_bias gate.weight conv1d dt_bias A_log attn_hc.base attn_hc.scale ffn_hc.base ffn_hc.scale",
        "Glm5NextForConditionalGeneration Glm5NextModel Glm5NextTextModel Glm5NextVisionModel",
    ),
    (
        "post_attention_layernorm input_layernorm norm",
        "",
        "GptOssForCausalLM GptOssForSequenceClassification GptOssForTokenClassification GptOssModel",
    ),
    ("", "latent_mean latent_std freqs", "GradiumPhononTTSForConditionalGeneration PocketTTSForConditionalGeneration"),
    ("", "conv.norm", "GraniteSpeech5Encoder GraniteSpeech5ForCTC"),
    ("", "lm_head", "HYV4ForCausalLM HYV4VLForConditionalGeneration"),
    (
        "",
        "e_score_correction_bias gate.weight fn scale base hc_fn hc_scale hc_base weights_proj k_norm sinks",
        "HYV4Model HYV4VLModel HYV4VLTextModel HYV4VLVisionModel",
    ),
    (
        "",
        "e_score_correction_bias mlp.gate.weight post_attention_convolution post_mlp_convolution sconv.conv1d "
        "attention_input mlp_input final_input",
        "Inkling2ForCausalLM Inkling2ForConditionalGeneration Inkling2Model Inkling2TextModel Inkling2VisionModel",
    ),
    (
        "",
        "e_score_correction_bias mlp.gate.weight post_attention_convolution post_mlp_convolution sconv.conv1d "
        "attention_input mlp_input final_input message_input message_gate_proj forget_gate_proj",
        "Inkling2LoopForCausalLM Inkling2LoopForConditionalGeneration Inkling2LoopModel Inkling2LoopTextModel",
    ),
    (
        "",
        "attn_sconv mlp_sconv k_sconv v_sconv e_score_correction_bias gate.global_scale",
        "InklingAudioModel InklingForCausalLM InklingForConditionalGeneration InklingModel InklingTextModel "
        "InklingVisionModel",
    ),
    (
        "query_tokens",
        "",
        "InstructBlipForConditionalGeneration InstructBlipModel InstructBlipVideoForConditionalGeneration "
        "InstructBlipVideoModel",
    ),
    ("", "e_score_correction_bias gate.weight dt_bias", "KimiLinearForCausalLM KimiLinearModel"),
    ("", "e_score_correction_bias", "Kolibri1ForCausalLM Kolibri1Model"),
    ("", "codec_model", "KyutaiSpeechToTextForConditionalGeneration"),
    ("classifier.weight", "", "LongcatFlashForCausalLM LongcatFlashModel"),
    (
        "wo",
        "",
        "MT5EncoderModel MT5ForConditionalGeneration MT5ForQuestionAnswering MT5ForSequenceClassification "
        "MT5ForTokenClassification MT5Model MT5Stack Pop2PianoForConditionalGeneration Pop2PianoStack T5EncoderModel "
        "T5ForConditionalGeneration T5ForQuestionAnswering T5ForSequenceClassification T5ForTokenClassification "
        "T5Model T5Stack UMT5EncoderModel UMT5ForConditionalGeneration UMT5ForQuestionAnswering "
        "UMT5ForSequenceClassification UMT5ForTokenClassification UMT5Model UMT5Stack UdopEncoderModel "
        "UdopForConditionalGeneration UdopModel UdopStack",
    ),
    (
        "indexer.weights_proj",
        "rotary_emb mlp.gate.weight",
        "MistralLarge4ForConditionalGeneration MistralLarge4Model MistralLarge4TextModel",
    ),
    (
        "",
        "post_attention_residual_gate post_feedforward_residual_gate mlp.gate.weight e_score_correction_bias",
        "MuseSparkAudioModel MuseSparkForConditionalGeneration MuseSparkModel MuseSparkTextModel MuseSparkVisionModel",
    ),
    ("", "audio_tower multi_modal_projector", "Nemotron3_5TranscribeModel"),
    ("", "sinks", "OpenAIPrivacyFilterForTokenClassification OpenAIPrivacyFilterModel"),
    ("time_decay time_first", "", "RwkvForCausalLM RwkvModel"),
    (
        "",
        "structure_attention_cell structure_generator",
        "SLANeXtBackbone SLANeXtForTableRecognition SLANeXtSLAHead SLANeXtVisionEncoder",
    ),
    ("", "embed_positions", "VoxtralForConditionalGeneration"),
)
# End of what scripts/make_keep_fp32.py writes.

# What the attributes do not say; found by ``scripts/make_keep_fp32.py --missed``.
MORE_TRANSFORMERS: tuple[tuple[str, str, str], ...] = (
    # Made of models that have lists, by their default configs; on load a model gathers those of its parts
    # (``post_init`` in ``transformers/modeling_utils.py``).
    (
        "",
        "e_score_correction_bias gate.weight",
        "Kimi_K25ForConditionalGeneration Kimi_K25Model NemotronH_Omni_Reasoning_V3",
    ),
    (
        "",
        "e_score_correction_bias gate.weight fn scale base hc_fn hc_scale hc_base weights_proj k_norm sinks",
        "HYV4ForCausalLM HYV4VLForConditionalGeneration",
    ),
    ("wo", "", "MusicgenForConditionalGeneration MusicgenMelodyForConditionalGeneration"),
    ("", "perception.encoder perception.proj", "Nemotron3_5TranscribeForConditionalGeneration"),
    (
        "",
        "audio_tower multi_modal_projector e_score_correction_bias gate.weight",
        "Nemotron3_5TranscribeForConditionalGeneration Nemotron3_5TranscribeModel",
    ),
    # Named otherwise in files: the lists are for the names after the renaming on load
    # (``transformers/conversion_mapping.py``).
    (
        "",
        "expert_bias",
        "BailingHybridForCausalLM BailingHybridModel HYV3ForCausalLM HYV3Model Kolibri1ForCausalLM Kolibri1Model",
    ),
    (
        r"attn*compressor\.(wkv|wgate) indexer\.weights_proj",
        r"hc_attn_ hc_ffn_ attn_sink compressor\.ape ffn\.gate\.bias",
        "DeepseekV4ForCausalLM DeepseekV4Model",
    ),
    ("", "router_bias", "Dots3NoteForConditionalGeneration Dots3NoteModel Dots3NoteVisionModel"),
    ("", "softmax_offset", "FlintForCausalLM FlintModel"),
    (
        "",
        "hc_attn_base hc_attn_scale hc_ffn_base hc_ffn_scale",
        "Glm5NextForConditionalGeneration Glm5NextModel Glm5NextTextModel",
    ),
    ("", "emb_mean emb_std", "GradiumPhononTTSForConditionalGeneration"),
    (
        "",
        "learnable_sink_param",
        "HYV4ForCausalLM HYV4Model HYV4VLForConditionalGeneration HYV4VLModel HYV4VLTextModel",
    ),
    (
        "",
        r"attn_res attn_sconv mlp_sconv attn\.[kv]_sconv\.weight$ mlp\.gate\.bias",
        "Inkling2ForCausalLM Inkling2ForConditionalGeneration Inkling2LoopForCausalLM "
        "Inkling2LoopForConditionalGeneration Inkling2LoopModel Inkling2LoopTextModel Inkling2Model Inkling2TextModel",
    ),
    (
        "",
        "forget_weight gain_weight middle_cycle_cross_pass",
        "Inkling2LoopForCausalLM Inkling2LoopForConditionalGeneration Inkling2LoopModel Inkling2LoopTextModel",
    ),
    ("", r"mlp\.gate\.bias", "InklingForConditionalGeneration InklingModel"),
    (
        "",
        r"layers\.\d+\.gate\.weight",
        "MistralLarge4ForConditionalGeneration MistralLarge4Model MistralLarge4TextModel",
    ),
    # Made as float32 in their class, whatever the dtype of the model: the loader leaves it so
    # (``empty_param.dtype`` in ``transformers/core_model_loading.py``).
    (
        "",
        "inv_freq",
        "ClvpEncoder ClvpModelForConditionalGeneration EsmForMaskedLM EsmForSequenceClassification "
        "EsmForTokenClassification EsmModel EvollaForProteinText2Text EvollaModel EvollaSaProtProteinEncoder",
    ),
    ("", r"codebook\.initialized", "CsmForConditionalGeneration MimiModel"),
    (
        "",
        "num_points_scale",
        "DFineDecoder DFineForObjectDetection DFineModel Deimv2Decoder Deimv2ForObjectDetection Deimv2Model",
    ),
    (
        "",
        "q_bias v_bias",
        "DebertaForMaskedLM DebertaForQuestionAnswering DebertaForSequenceClassification "
        "DebertaForTokenClassification DebertaModel",
    ),
    ("", "log_delta", "EsmFold2Model"),
    ("", "A_log", "OlmoHybridForCausalLM OlmoHybridModel ZambaForCausalLM ZambaForSequenceClassification ZambaModel"),
    ("", "token2wav", "Qwen2_5OmniForConditionalGeneration"),
    ("", "n_points_scale", "RTDetrV2Decoder RTDetrV2ForObjectDetection RTDetrV2Model"),
    (
        "",
        r"position_embeddings\.weights",
        "ReformerForMaskedLM ReformerForQuestionAnswering ReformerForSequenceClassification ReformerModel "
        "ReformerModelWithLMHead",
    ),
    (
        "",
        r"quantizer\.codevectors label_embeddings_concat",
        "UniSpeechForPreTraining UniSpeechSatForPreTraining Wav2Vec2ConformerForPreTraining Wav2Vec2ForPreTraining",
    ),
    ("", r"embeddings\.position_embedding$", "VideoPrismClipModel VideoPrismTextModel"),
    (
        "",
        r"rel_attn\.(?!layer_norm) mask_emb",
        "XLNetForMultipleChoice XLNetForQuestionAnswering XLNetForQuestionAnsweringSimple "
        "XLNetForSequenceClassification XLNetForTokenClassification XLNetLMHeadModel XLNetModel",
    ),
    ("", "balancing_biases", "ZayaForCausalLM ZayaModel"),
)

# Named otherwise in files, too: a list's entry is in that name and not in the one after the renaming.
NOT_TRANSFORMERS: tuple[tuple[str, str], ...] = (
    (
        "linear_gate.weight",
        "HYV4ForCausalLM HYV4Model HYV4VLForConditionalGeneration HYV4VLModel HYV4VLTextModel",
    ),
)

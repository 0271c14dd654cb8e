"""`Seq2Seq` as a model of transformers (4.57 and 5), for its `generate`, `Seq2SeqTrainer` and `save_pretrained`.

transformers has no encoder-decoder with Pre-LN and rotary positions, so an exported folder carries the code of its
model: model.py and this file, joined by `modelling_file` in hf.py. Shapes as in model.py.
"""

from dataclasses import fields

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from model import IGNORE, ModelConfig, Seq2Seq, _init_weights


class Seq2SeqConfig(PretrainedConfig):
    """The fields of `ModelConfig`, and those that transformers has for any model, such as the special ids."""

    model_type = "sequential-seq2seq"
    attribute_map = {"num_hidden_layers": "n_decoder_layers", "hidden_size": "d_model"}  # noqa: RUF012 (their names)


class Seq2SeqLM(PreTrainedModel, GenerationMixin):
    """`Seq2Seq` with the interface of transformers; its tensors have our names with `model.` before them."""

    config_class = Seq2SeqConfig
    _input_embed_layer = "embed"  # of self.model; the output projection is the same tensor, so there is nothing to tie
    accepts_loss_kwargs = False  # the loss is a mean whatever the Trainer says about accumulated batches

    def __init__(self, config: Seq2SeqConfig):
        super().__init__(config)
        self.model = Seq2Seq(ModelConfig(**{field.name: getattr(config, field.name) for field in fields(ModelConfig)}))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(module)

    def get_encoder(self, modality: str | None = None) -> "Seq2SeqLM":
        """The model itself: called without a target, it only encodes."""
        return self

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:  # [B, T] -> [B, T]
        """Labels shifted right, after <s>; `DataCollatorForSeq2Seq` calls it too."""
        shifted = F.pad(labels[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        return shifted.masked_fill(shifted == IGNORE, self.config.pad_token_id)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: object,
    ) -> Seq2SeqLMOutput | BaseModelOutput:
        """Logits [B, T, V] for source [B, S] and target [B, T]; with labels [B, T], also their mean loss.

        Targets may be padded only at the end. Without target and labels, the output of the encoder [B, S, D].
        Other arguments that transformers passes are ignored. Raises ValueError for a row too long for the model.
        """
        src_mask = None if attention_mask is None else attention_mask.bool()
        enc_out = self.model.encode(input_ids, src_mask) if encoder_outputs is None else encoder_outputs[0]
        if decoder_input_ids is None and labels is None:
            return BaseModelOutput(last_hidden_state=enc_out)
        if decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        cache = None  # the layers of theirs are used like KeyValues
        if past_key_values is not None:
            cache = list(zip(past_key_values.self_attention_cache.layers, past_key_values.cross_attention_cache.layers))
        logits = F.linear(self.model.decode(decoder_input_ids, enc_out, src_mask, cache), self.model.embed.weight)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, past_key_values=past_key_values, encoder_last_hidden_state=enc_out
        )

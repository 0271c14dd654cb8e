"""`Seq2Seq` as a model of transformers (4.57 and 5), for its `generate`, `Seq2SeqTrainer` and `save_pretrained`.

transformers has no encoder-decoder with Pre-LN and rotary positions, so an exported folder carries the code of its
model: model.py and this file, joined by `modelling_file` in hf.py. Shapes as in model.py.
"""

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from model import IGNORE, ModelConfig, Seq2Seq, _init_weights, turn_of


class Seq2SeqConfig(PretrainedConfig):
    """The fields of `ModelConfig`, and those that transformers has for any model, such as the special ids."""

    model_type = "sequential-seq2seq"
    attribute_map = {"num_hidden_layers": "n_decoder_layers", "hidden_size": "d_model"}  # noqa: RUF012 (their names)


class Seq2SeqLM(PreTrainedModel, GenerationMixin):
    """`Seq2Seq` with the interface of transformers; its tensors have our names with `model.` before them."""

    config_class = Seq2SeqConfig
    accepts_loss_kwargs = False  # the loss is a mean whatever the Trainer says about accumulated batches

    def __init__(self, config: Seq2SeqConfig):
        super().__init__(config)
        self.model = Seq2Seq(ModelConfig(**{field.name: getattr(config, field.name) for field in fields(ModelConfig)}))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(module)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding; the output projection is the same tensor, so there is nothing to tie."""
        return self.model.embed

    def set_input_embeddings(self, embed: nn.Embedding) -> None:
        """For `resize_token_embeddings`."""
        self.model.embed = embed

    def get_encoder(self, modality: str | None = None) -> "Seq2SeqLM":
        """The model itself: called without a target, it only encodes."""
        return self

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:  # [B, T] -> [B, T]
        """Labels shifted right, after <s>; `DataCollatorForSeq2Seq` calls it too."""
        shifted = F.pad(labels[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        return shifted.masked_fill(shifted == IGNORE, self.config.pad_token_id)

    def prepare_inputs_for_generation(
        self,
        decoder_input_ids: Tensor,
        past_key_values: EncoderDecoderCache | None = None,
        attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        **kwargs: object,
    ) -> dict:
        """The arguments of `forward` for the next token; with a cache, only the part of the target [B, T] not in it."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs = dict(decoder_input_ids=decoder_input_ids[:, seen:], past_key_values=past_key_values)
        return inputs | dict(attention_mask=attention_mask, encoder_outputs=encoder_outputs)

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
        if past_key_values is None:
            hidden = self.model.decode(decoder_input_ids, enc_out, src_mask)  # [B, T, D]
        else:
            hidden = self._decode_newest(decoder_input_ids, enc_out, src_mask, past_key_values)
        logits = F.linear(hidden, self.model.embed.weight)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, past_key_values=past_key_values, encoder_last_hidden_state=enc_out
        )

    def _decode_newest(
        self, tgt_in: Tensor, enc_out: Tensor, src_mask: Tensor | None, cache: EncoderDecoderCache
    ) -> Tensor:  # [B, T], [B, S, D] -> [B, T, D]
        """`Seq2Seq.decode` of the T newest tokens, without dropout; the cache holds keys and values of earlier ones."""
        start, decoder = cache.get_seq_length(), self.model.decoder
        x = self.model.embed(tgt_in)  # [B, T, D]
        turn, src_turn = turn_of(decoder.cfg, x, start), turn_of(decoder.cfg, enc_out)
        causal = torch.ones(x.shape[1], start + x.shape[1], dtype=torch.bool, device=x.device).tril(start)
        mask = None if src_mask is None else src_mask[:, None, None, :]  # [B, 1, 1, S]
        for i, block in enumerate(decoder.blocks):
            h = block.attn_norm(x)
            k, v = cache.self_attention_cache.update(*block.attn.keys_values(h, turn), i)  # [B, H, start + T, K]
            if start == 0:
                cache.cross_attention_cache.update(*block.cross.keys_values(enc_out, src_turn), i)
            cross = cache.cross_attention_cache.layers[i]
            x = x + block.attn(h, k, v, causal, turn=turn)
            x = x + block.cross(block.cross_norm(x), cross.keys, cross.values, mask, turn=turn)
            x = x + block.ffn(block.ffn_norm(x))
        return decoder.norm(x)

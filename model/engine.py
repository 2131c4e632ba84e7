"""BERT as one graph of OpenVINO, to predict with on CPUs; torch stays the reference.

Torch spends much of a small batch's time between operations, and holds Python's lock while it does.
The engine runs the whole graph in one call, without the lock.

B batch, T text tokens of the longest row, N text tokens of all rows, P virtual tokens, L layers, H
heads, D head size (HD the hidden size), G prefixes in a batch.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn
from transformers import BertModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from model.bert import PACKED_ATTENTION, to_openvino
from model.sequence_classification import POOLINGS
from runtime.machine import Machine

SHAPES = "30"  # of batches, whose kernels are kept: each takes about 3 MB
PACKED = 16  # tokens
MASKED = -1e4  # is added to the scores of padding


class Graph(nn.Module):
    """A BERT from word embeddings to what the pooling reads, in a form that can be traced."""

    def __init__(self, bert: BertModel, pooler: bool) -> None:
        super().__init__()
        bert.set_attn_implementation(PACKED_ATTENTION)
        self.bert, self.pooler = bert, pooler

    def forward(self, embeds, positions, mask, tokens, back, place=None, source=None, *slots):
        """Map packed tokens to [B, HD] of the pooler, or to all states, [1, N, HD].

        embeds: of words, [1, N, HD]. positions: [1, N]. mask: added to the scores, [B, P+T].
        tokens, back, place, source: `packed` and `table_rows` of `prefix_encoder.attend_packed`.
        slots: [2, H, G, P, D] of each layer.
        """
        options = {"prefix": slots.__getitem__, "table_rows": (place, source)} if slots else {}
        states, pooled = self.bert(
            inputs_embeds=embeds,
            attention_mask=mask[:, None, None],
            position_ids=positions,
            packed=(tokens, back),
            return_dict=False,
            **options,
        )
        return pooled if self.pooler else states


class CompiledBert(nn.Module):
    """A compiled BertModel; it is called as one, by any number of threads at once."""

    def __init__(self, bert: BertModel, machine: Machine, pooling: str, with_prefix: bool) -> None:
        """pooling: it is computed no further than that reads.

        with_prefix: calls pass a `prefix` of any length, in the machine's precision.
        """
        import openvino  # only for those who use it

        super().__init__()
        config = bert.config
        heads, width = config.num_attention_heads, config.hidden_size
        self.words, self.pooler = bert.get_input_embeddings(), POOLINGS[pooling].reads_pooler
        self.layers = config.num_hidden_layers if with_prefix else 0
        numbers, virtual = torch.arange(6), 4 * with_prefix  # two rows of three tokens
        example = [torch.zeros(1, 6, width), numbers[None] % 3, torch.zeros(2, virtual + 3)]
        example += [numbers.view(2, 3), numbers]
        shapes = [[1, -1, width], [1, -1], [-1, -1], [-1, -1], [-1]]
        if with_prefix:
            slots = torch.zeros(2, heads, 2, virtual, width // heads, dtype=machine.dtype)
            example += [torch.arange(2), torch.arange(2)[:, None], *[slots] * self.layers]
            shapes += [[-1], [-1, -1], *[[2, heads, -1, -1, width // heads]] * self.layers]
        model = to_openvino(Graph(bert, self.pooler).eval(), example)
        model.reshape(dict(zip(model.inputs, shapes, strict=True)))
        settings = {
            "NUM_STREAMS": machine.workers,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if machine.precision == "bf16" else "f32",
            "CPU_RUNTIME_CACHE_CAPACITY": SHAPES,
        }
        if machine.int8:
            store_in_int8(model)
            # activations become integers in every call, each group of 32 with its own scale
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "32"
        # OpenVINO gives the thread that first compiles a stack for signals, and frees it with the
        # last model. In a thread that lives on, the next signal, Ctrl-C included, would then crash
        with ThreadPoolExecutor(1) as thread:
            compiling = thread.submit(openvino.Core().compile_model, model, "CPU", settings)
        self.compiled = compiling.result()
        self.tensor = openvino.Tensor
        self.bfloat16 = lambda array: openvino.Tensor(array, array.shape, openvino.Type.bf16)
        self.requests = threading.local()  # one for each thread

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the word embeddings."""
        return self.words

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        prefix: Callable[[int], torch.Tensor] | None = None,
        table_rows: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> BaseModelOutputWithPooling:
        """Compute what the pooling reads; arguments as of BertModel and `prefix_encoder.attend`."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        rows, length = given.shape[:2]
        mask = attention_mask[:, -length:] != 0  # [B, T]; the mask of a prefix comes first
        # the tokens without padding, a multiple of PACKED of them: few kernels serve all batches
        packed = mask.flatten().nonzero()[:, 0]
        packed = nn.functional.pad(packed, (0, -len(packed) % PACKED))
        tokens = (mask.flatten().cumsum(0) - 1).clamp(min=0).view(rows, length)
        away = (1 - attention_mask.float()) * MASKED
        if rows == 1:  # nearly all texts that are alone have one shape then, which saves 1 ms
            missing = -length % PACKED
            tokens = nn.functional.pad(tokens, (0, missing))
            away = nn.functional.pad(away, (0, missing), value=MASKED)
        if position_ids is None:
            position_ids = torch.arange(length)[None]
        positions = position_ids.expand(rows, length).flatten()[packed]
        embeds = given.flatten(0, 1)[packed]
        embeds = self.words(embeds) if inputs_embeds is None else embeds
        inputs = [embeds[None], positions[None], away, tokens, packed]
        if self.layers:
            table_rows = table_rows or (torch.arange(rows), torch.arange(rows)[None])
            inputs += [*table_rows, *map(prefix, range(self.layers))]
        if not hasattr(self.requests, "own"):
            self.requests.own = self.compiled.create_infer_request()
        request = self.requests.own
        for number, tensor in enumerate(inputs):
            request.set_input_tensor(number, self.shared(tensor))
        request.infer()
        output = torch.from_numpy(request.get_output_tensor(0).data.copy())
        if self.pooler:
            return BaseModelOutputWithPooling(pooler_output=output)
        return BaseModelOutputWithPooling(last_hidden_state=output[0][tokens[:, :length]])

    def shared(self, tensor: torch.Tensor):
        """Return an input of the graph that shares a tensor's memory; NumPy has no bfloat16."""
        tensor = tensor.contiguous()
        if tensor.dtype == torch.bfloat16:
            return self.bfloat16(tensor.view(torch.uint16).numpy())
        return self.tensor(tensor.numpy(), shared_memory=True)


def store_in_int8(model) -> None:
    """Round the weights of a graph's matrix products to 8 bits, with a scale for each output.

    As `nncf.compress_weights(mode=INT8_SYM)` does, which would bring 20 packages.
    """
    import openvino.opset15 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        constant = node.input_value(1).get_node()
        if constant.get_type_name() != "Constant":
            continue
        axis = 1 if node.get_attributes()["transpose_b"] else 0  # of the inputs
        scale = np.abs(constant.data).max(axis=axis, keepdims=True).clip(1e-9) / 127
        rounded = ops.constant((constant.data / scale).round().astype(np.int8))
        weight = ops.multiply(ops.convert(rounded, "f32"), ops.constant(scale))
        node.input(1).replace_source_output(weight.output(0))


def ready(bert: BertModel, machine: Machine, pooling: str, with_prefix: bool = False) -> nn.Module:
    """Return a frozen BERT to predict with: compiled, if that is the machine's engine."""
    if machine.engine == "torch":
        return bert
    return CompiledBert(bert, machine, pooling, with_prefix)

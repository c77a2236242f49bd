"""A call is cut by the names of its fields, and the schema of the operators is made of them."""

import torch

from titans.arguments import Call, dense
from titans.autograd import chunked, chunked_backward, step, unrecorded


def test_the_parts_of_a_call_are_its_fields_in_order() -> None:
    names = Call._make(Call._fields)
    assert names.differentiable == ("q", "k", "v", "w", "b", "theta", "alpha", "eta", "M", "S", "anchor")
    assert names.tensors == (*names.differentiable, "offset", "cu_seqlens")
    assert names.options == ("eps", "chunk_size", "log_gates")
    assert (*names.tensors, *names.options) == names


def test_the_operators_take_the_fields_of_a_call() -> None:
    for operator in (chunked, unrecorded, chunked_backward, step):
        arguments = operator._schema.arguments[: len(Call._fields)]
        assert tuple(argument.name for argument in arguments) == Call._fields
        optional = {argument.name for argument in arguments if isinstance(argument.type, torch.OptionalType)}
        assert optional == {"w", "b", "offset", "cu_seqlens"}


def test_a_dense_tensor_begins_at_a_multiple_of_16_bytes() -> None:
    """Or the compiler of the kernels would load its tiles, and add up their rows, in another way."""
    x = torch.arange(12.0)
    for given in (x[1:], x[:8].view(2, 4).mT, x[4:]):
        found = dense(given)
        assert torch.equal(found, given)
        assert found.is_contiguous()
        assert found.data_ptr() % 16 == 0
    assert dense(x[4:]).data_ptr() == x[4:].data_ptr()

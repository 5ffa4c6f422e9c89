"""A function's result and its gradients with respect to all of its tensors."""


def with_gradients(function, tensors, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]

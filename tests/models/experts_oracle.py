"""A mixture of experts in float64, one token and one expert at a time; it shares no code with the package."""

import math

import numpy as np

ERF = np.vectorize(math.erf)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def act(name, up, gate):
    if name == "swiglu":
        return gate / (1 + np.exp(-gate)) * up
    if name == "relu":
        return np.maximum(up, 0)
    assert name == "gelu"
    return 0.5 * up * (1 + ERF(up / math.sqrt(2)))


def project(module, x, expert=None):
    kernel, bias = np.asarray(module["kernel"], np.float64), module.get("bias")
    if expert is not None:
        kernel, bias = kernel[expert], None if bias is None else bias[expert]
    return x @ kernel + (0 if bias is None else np.asarray(bias, np.float64))


def feed_forward(name, module, x, expert=None):
    gate = project(module["gate"], x, expert) if "gate" in module else None
    return project(module["down"], act(name, project(module["up"], x, expert), gate), expert)


def experts(params, x, real, *, k, over, activation, capacity=None):
    """`(y, statistics)` of `x` [batch, length, width] under weights as `Experts` has them.

    `capacity`: places of an expert in each row; None for no end of them.
    """
    router = np.asarray(params["router"], np.float64)
    count = router.shape[1]
    y = np.zeros(x.shape)
    statistics = {"assigned": np.zeros(count), "probability": np.zeros(count), "z": 0.0, "dropped": 0.0}
    for b in range(x.shape[0]):
        taken = [0] * count
        for t in range(x.shape[1]):
            token = np.asarray(x[b, t], np.float64)
            if "shared" in params:
                share = 1.0
                if "shared_gate" in params:
                    share = 1 / (1 + np.exp(-(token @ np.asarray(params["shared_gate"], np.float64))))
                y[b, t] += share * feed_forward(activation, params["shared"], token)
            if not real[b, t]:
                continue
            logits = token @ router
            probability = softmax(logits)
            chosen = sorted(range(count), key=lambda e: (-logits[e], e))[:k]
            total = sum(probability[e] for e in chosen) if over == "chosen" else 1.0
            statistics["probability"] += probability
            statistics["z"] += np.log(np.exp(logits).sum()) ** 2
            for e in chosen:
                statistics["assigned"][e] += 1
                if capacity is not None and taken[e] >= capacity:
                    statistics["dropped"] += 1
                    continue
                taken[e] += 1
                y[b, t] += probability[e] / total * feed_forward(activation, params, token, e)
    return y, statistics

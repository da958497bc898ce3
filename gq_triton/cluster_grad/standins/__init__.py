"""Stand-ins: parameters of any module, clustered where an operation meets them with the samples.

A module without a family uses its parameters in ways that nobody wrote down: a class token, learned
positions, the scale of a norm, a table of relative positions. During the module's own ``forward``
each parameter is replaced by a *stand-in*, a tensor that looks on while operations use it. What is
computed from stand-ins alone belongs to no sample. Where an operation *meets* a stand-in with a
tensor of samples, the stand-in is expanded over the samples, so that its gradient comes back by
sample and is summed by cluster.
"""

"""The parts of benchmarks/moe_layer.py.

shapes.py   the layers' sizes and the cases of each suite
layers.py   weights, routing and the layers as users write them
errors.py   the float32 reference and the error against it
workload.py what a case runs: one callable per baseline
local.py    suite "local"; hf.py: "block", "model" and "ep-hf"; ep.py: "ep"
timing.py   clocks, interleaving, CUDA graphs, peak memory
measure.py  from a workload to rows
runner.py   command line, processes, table, JSON

Legend: T tokens (per rank), A experts per token, S = T*A slots, E experts, L experts of a rank,
H model dim, I expert intermediate dim.
"""

"""The parts of benchmarks/moe_layer.py.

cli.py      command line; starts a process per rank
shapes.py   names, the layers' sizes and the cases of each suite
layers.py   weights, routing and the layers as users write them
errors.py   the float32 reference and the error against it
workload.py what a case runs: one callable per baseline
local.py    suite "local"; hf.py: "block", "model", "ep-hf"; ep.py: "ep"
timing.py   clocks, interleaving, CUDA graphs, peak memory
measure.py  from a workload to rows
runner.py   runs the cases, stores JSON; tables.py prints

Legend: T tokens (per rank), A experts per token, S = T*A slots, E experts, L experts of a rank,
H model dim, I expert intermediate dim.
"""

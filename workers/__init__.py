"""The science: data, SpeechLLM, redundancy maps, surgery, healing, evaluation.

Runs without Ray and imports neither `cluster` nor `orchestrator`: every stage is a plain
function that can be called from a notebook or a test.
"""

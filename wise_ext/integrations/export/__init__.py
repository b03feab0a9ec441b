"""Edited memories as files of other libraries: plain weights, or PEFT adapters.

What a memory has and neither of these can hold is the router: the edit is on for every prompt
(weights), or for as long as somebody switches it on (an adapter).
"""

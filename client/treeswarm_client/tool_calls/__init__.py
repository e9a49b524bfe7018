"""What a model's answer consists of: text, reasoning and tool calls, read while it streams.  Pure.

A parser here is a generator that asks a reader for characters and yields whenever it must wait for more of the text.
It sees one character after the other, so how the text was cut into pieces changes nothing.
"""

"""What a model's answer is made of: thoughts, content and calls of tools, read from text that comes in pieces.

However the text is cut, the same parts come out, and nothing of it is lost: what is neither a thought nor a call is
content. White space around thoughts and calls, and the tags themselves, belong to the format and are left out.
"""

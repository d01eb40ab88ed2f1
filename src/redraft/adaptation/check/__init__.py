"""``redraft check``: why acceptance is low.

``causes`` is the table of what can be wrong, with words and the command that mends it. ``static`` lays the reading of
the draft's own trainer beside an engine's, without computing anything. ``rounds`` walks drafts over the target's own
answers, ``trials`` changes one thing at a time there. ``served`` asks a server, ``verdict`` weighs what was found, and
``run`` does all of it in order.
"""

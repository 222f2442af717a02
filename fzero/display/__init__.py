"""How states, sharded trees and programs look: printed, in a notebook, and drawn.

Only formatting, beneath what it shows.
"""

"""How states, sharded trees and programs look: printed, in a notebook, and drawn.

Only formatting, above what it shows.
"""

from fzero.display.html import html_of as html_of
from fzero.display.html import html_of_program as html_of_program
from fzero.display.listing import of_sharded as of_sharded
from fzero.display.listing import of_state as of_state
from fzero.display.text import text_of as text_of

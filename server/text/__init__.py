"""From text to token ids and back, and the templates of chat; knows no HTTP."""

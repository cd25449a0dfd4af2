"""The HTTP side of the emulator: every path of the protocol and the emulator's own."""

"""Signed messages between runs and whoever watches or steers them (design name: Oona).

A `Bus` transports bytes over streams, in this process or by Redis; envelopes say who may have
written them, for which run and when; messages are what they say.
"""

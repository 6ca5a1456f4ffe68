"""Temporal grounding with a frozen transformer: which moments of a video does a sentence mean?"""

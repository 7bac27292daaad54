"""Tests of core/eval."""

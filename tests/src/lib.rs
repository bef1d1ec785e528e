//! Suites that use Cutover as its users do: conformance, import, swap, rollout.

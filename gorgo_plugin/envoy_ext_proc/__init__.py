"""The Envoy adapter: GORGO as an external-processing service, and the envoy.yaml that puts it into effect."""

{{/* What `stagemesh X --config` reads. What the chart sets comes first; values.schema.json keeps users off those keys.
     JSON is YAML: numbers keep their form and strings their quotes. */}}

{{- define "stagemesh.yaml" -}}
{{- range $key, $value := . }}
{{ $key }}: {{ $value | toJson }}
{{- end }}
{{- end }}

{{- define "stagemesh.coordinatorSettings" -}}
{{- $own := dict "host" "0.0.0.0" "insecure" true "port" 50050 "pipeline_parallel_size" (len .Values.stages) "state_dir" "/var/lib/stagemesh" -}}
{{- if .Values.model.path }}{{ $_ := set $own "model" .Values.model.path }}{{ end -}}
{{- with include "stagemesh.hubId" . }}{{ $_ := set $own "model" . }}{{ end -}}
{{- with dig "hub" "revision" "" .Values.model }}{{ $_ := set $own "revision" . }}{{ end -}}
{{- if .Values.coordinator.lease.enabled }}{{ $_ := set $own "kubernetes_lease" (printf "%s-coordinator" (include "stagemesh.fullname" .)) }}{{ end -}}
{{- include "stagemesh.yaml" (merge $own .Values.coordinator.settings) }}
{{- end }}

{{- define "stagemesh.gatewaySettings" -}}
{{- $own := dict "host" "0.0.0.0" "insecure" true "port" 8000 "grpc_port" 50051 "coordinator" (include "stagemesh.coordinatorAddress" .) -}}
{{- include "stagemesh.yaml" (merge $own .Values.gateway.settings) }}
{{- end }}

{{/* Takes (dict "root" $ "bound" (dict "stage" 0), or of a standby (dict), "stage" the stage's or standby's values). */}}
{{- define "stagemesh.stageSettings" -}}
{{- $size := int (default 1 .stage.tensorParallelSize) -}}
{{- $own := dict "host" "0.0.0.0" "insecure" true "port" 50052 "coordinator" (include "stagemesh.coordinatorAddress" .root) "tensor_parallel_size" $size -}}
{{- $own = merge $own .bound -}}
{{- $settings := default dict .stage.settings -}}
{{- $cpu := dig "resources" "limits" "cpu" "" .stage | toString -}}
{{- if and $cpu (not (hasKey $settings "threads")) }}
{{- /* A worker would find its limit by itself. Here its settings say it. */}}
{{- $cores := ternary (divf (trimSuffix "m" $cpu | float64) 1000.0) ($cpu | float64) (hasSuffix "m" $cpu) }}
{{- $_ := set $own "threads" (max 1 (floor (divf $cores (float64 $size)) | int)) }}
{{- end }}
{{- include "stagemesh.yaml" (merge $own $settings) }}
{{- end }}

{{/* Seconds until Kubernetes kills a pod: what the service takes to drain, and some to end in order.
     Takes (dict "settings" a service's settings "more" seconds beside draining). */}}
{{- define "stagemesh.gracePeriod" -}}
{{- $drain := 30.0 -}}
{{- if kindIs "map" .settings }}{{ if hasKey .settings "drain_timeout" }}{{ $drain = .settings.drain_timeout }}{{ end }}{{ end -}}
{{ add (ceil $drain | int) .more }}
{{- end }}

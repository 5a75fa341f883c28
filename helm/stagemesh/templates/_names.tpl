{{/* Names and labels. Pod names of StatefulSets must stay short: 40 characters leave room for "-coordinator-0". */}}

{{- define "stagemesh.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "stagemesh.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "stagemesh.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "stagemesh.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "stagemesh.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: stagemesh
{{- end }}

{{/* What selects pods, and all the labels that they carry: a new chart version alone restarts nothing.
     Takes (dict "root" $ "component" "coordinator|gateway|stage" ["stage" "0"]). */}}
{{- define "stagemesh.selector" -}}
app.kubernetes.io/name: {{ include "stagemesh.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- if hasKey . "stage" }}
stagemesh-stage: {{ .stage | quote }}
{{- end }}
{{- end }}

{{- define "stagemesh.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "stagemesh.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "stagemesh.secret" -}}
{{- default (printf "%s-api-key" (include "stagemesh.fullname" .)) .Values.apiKey.existingSecret }}
{{- end }}

{{/* Takes (dict "root" $ "pod" the service's values). */}}
{{- define "stagemesh.image" -}}
{{ .root.Values.image.repository }}:{{ coalesce .pod.imageTag .root.Values.image.tag .root.Chart.AppVersion }}
{{- end }}

{{/* Where workers and gateways find the coordinator. */}}
{{- define "stagemesh.coordinatorAddress" -}}
{{ include "stagemesh.fullname" . }}-coordinator.{{ .Release.Namespace }}.svc:50050
{{- end }}

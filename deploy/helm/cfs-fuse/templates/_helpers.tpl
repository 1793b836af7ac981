{{- define "cfs-fuse.name" -}}
{{- printf "%s" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "cfs-fuse.labels" -}}
app.kubernetes.io/name: cfs-fuse
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "cfs-fuse.selector" -}}
app.kubernetes.io/name: cfs-fuse
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "cfs-fuse.args" -}}
{{- $args := list "--runtime-dir" .Values.runtime "snapshotter" "--root" .Values.store -}}
{{- if .Values.metrics.address }}{{ $args = concat $args (list "--metrics" .Values.metrics.address) }}{{ end -}}
{{- concat $args .Values.args | toJson -}}
{{- end -}}
